"""What is the user's own, by name: a model, a data set, a loss, a metric or an optimizer.

A name has a colon in it: ``package.module:function`` is imported, ``timm:NAME`` and ``torchvision:NAME`` are models of
those packages, and `register` gives a name to an object that cannot be imported, as `signstep.lab.compare` does.
A run's configuration has the name alone: what it stands for is looked up where the run trains.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from signstep.lab.errors import BadInput
from signstep.lab.training.tasks import is_name

_registered: dict[tuple[str, str], Any] = {}


def register(name: str, what: str, thing: Any) -> None:
    """Let `resolve` find an object under a name, in this process; `what` is as there."""
    _registered[what, name] = thing


def resolve(name: str, what: str) -> Any:
    """The object that a name stands for.

    Args:
        name: as in the header of this file; modules are also looked for in the working folder.
        what: "model", "data", "loss", "metric" or "optimizer"; begins the message of an error.

    Raises:
        BadInput: there is no such thing, or its module cannot be imported.
    """
    if (what, name) in _registered:
        return _registered[what, name]
    module, _, path = name.partition(":")
    if not is_name(name):
        raise BadInput(f"{what} {name!r}: expected package.module:name, or a name that signstep knows")
    found: Any = _imported(module, f"{what} {name}")
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            raise BadInput(f"{what} {name}: module {module} has no {path}; see how it is spelt") from error
    return found


def _imported(module: str, where: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # which the command `signstep` does not have there, as `python -m` has
    try:
        return importlib.import_module(module)
    except Exception as error:  # a module of the user's may raise anything while it is imported
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise BadInput(
            f"{where}: module {module} cannot be imported ({reason}); it is looked for in {here} and on PYTHONPATH"
        ) from error


def build(name: str, given: Mapping[str, Any]) -> nn.Module:
    """The model of a name, made by its factory.

    Args:
        name: of a factory, which is called with those of `given` that its parameters name; or ``timm:NAME``,
            ``torchvision:NAME``, with random weights.
        given: ``num_classes`` and ``in_channels``, where they are known of the data.

    Raises:
        BadInput: there is no such model, its factory needs other arguments, or it made something else.
    """
    library, _, model = name.partition(":")
    if library in ("timm", "torchvision") and ("model", name) not in _registered:
        return _of_library(library, model, given)
    factory = resolve(name, "model")
    if not callable(factory):
        raise BadInput(f"model {name}: expected a function or a class that makes the model, not {_kind(factory)}")
    try:
        signature = inspect.signature(factory)
    except ValueError:  # of what is written in C
        signature = inspect.Signature()
    chosen = {key: value for key, value in given.items() if key in signature.parameters}
    try:
        signature.bind(**chosen)
    except TypeError as error:
        known = " and ".join(f"{key}={value}" for key, value in given.items()) or "nothing, for the data names no more"
        raise BadInput(
            f"model {name}{signature}: {error}, and all there is to give is {known}; name a factory that needs no more"
        ) from error
    made = factory(**chosen)
    if not isinstance(made, nn.Module):
        raise BadInput(f"model {name}: its factory returned {_kind(made)}, expected a torch.nn.Module")
    return made


def _of_library(library: str, model: str, given: Mapping[str, Any]) -> nn.Module:
    where = f"model {library}:{model}"
    if "num_classes" not in given:
        raise BadInput(f"{where} needs the number of classes: give the training set an attribute `classes`")
    made: nn.Module
    try:
        if library == "timm":
            made = _imported("timm", where).create_model(
                model, num_classes=given["num_classes"], in_chans=given.get("in_channels", 3)
            )
        else:
            made = _imported("torchvision.models", where).get_model(model, num_classes=given["num_classes"])
    except BadInput:
        raise
    except Exception as error:  # each of the two has its own errors for a name that it does not know
        raise BadInput(f"{where} cannot be made ({str(error).partition(chr(10))[0]}); see {library}'s list") from error
    return made


def tried(name: str, model: nn.Module, x: Tensor) -> None:
    """Run a model once on a few inputs, in evaluation mode and without gradients; lazy layers take their shapes.

    Raises:
        BadInput: it fails on them.
    """
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(x)
    except Exception as error:  # what a model raises of inputs that it does not fit is its own affair
        raise BadInput(
            f"model {name} fails on inputs of shape {list(x.shape)}: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        model.train(training)


def digest(model: nn.Module) -> str:
    """12 hex digits that follow from a model's modules, their settings and the shapes of its weights; not from code."""
    shapes = [(key, tuple(value.shape), str(value.dtype)) for key, value in model.state_dict().items()]
    printed = re.sub(r"0x[0-9a-f]+", "", str(model))
    return hashlib.sha256(repr((printed, shapes)).encode()).hexdigest()[:12]


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a name: what its factory makes of a model's parameters and a learning rate.

    Raises:
        BadInput: there is no such factory, or it made something else.
    """
    factory = resolve(name, "optimizer")
    try:
        inspect.signature(factory).bind([], lr)
    except TypeError as error:
        raise BadInput(f"optimizer {name}: {error}; its factory is called with (params, lr)") from error
    made = factory(list(model.parameters()), lr)
    if not isinstance(made, torch.optim.Optimizer):
        raise BadInput(f"optimizer {name}: its factory returned {_kind(made)}, expected a torch.optim.Optimizer")
    return made
