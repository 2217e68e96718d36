"""The optimizers in timm's registry, so that timm makes them by name, with its own param_groups."""

from __future__ import annotations

from signstep.optim import HybridSignSGD, Lion, SignSGD

__all__ = ["register"]


def register() -> None:
    """Add "signsgd", "hybridsignsgd" and "signsteplion" to timm's registry.

    ``timm.optim.create_optimizer_v2(model, opt="signsgd", ...)`` and ``timm.optim.create_optimizer`` then make
    `signstep.SignSGD`, and so on, with timm's groups without weight decay and its layer decay, which takes effect
    through timm's schedulers; "lookahead_signsgd" is wrapped in timm's Lookahead. Other keywords of
    `create_optimizer_v2` are those of the optimizer. timm's own names, "lion" among them, stay as they are, and a
    second call changes nothing.

    Raises:
        ImportError: timm is not installed, or cannot be imported, as where its torchvision is of another torch; or it
            is older than 1.0.12 and has no registry.
        ValueError: another optimizer has one of the names.

    Example:
        .. code-block:: python

            import signstep.integrations.timm
            from timm.optim import create_optimizer_v2

            signstep.integrations.timm.register()
            optimizer = create_optimizer_v2(model, opt="signsgd", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    """
    try:
        from timm.optim import OptimInfo
        from timm.optim._optim_factory import default_registry
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision's operators, where it is of another torch
        raise ImportError(
            f"timm's optimizers cannot be imported ({error}): pip install 'timm>=1.0.12', and the torchvision that "
            "goes with your torch"
        ) from error
    infos = [
        OptimInfo("signsgd", SignSGD, "Sign of the momentum, dithered or not", has_eps=False, has_momentum=True),
        OptimInfo(
            "hybridsignsgd", HybridSignSGD, "SignSGD, then SGD at a measured rate", has_eps=False, has_momentum=True
        ),
        OptimInfo("signsteplion", Lion, "signstep's Lion, dithered or not", has_eps=False, has_betas=True),
    ]
    known = set(default_registry.list_optimizers())
    for info in infos:
        if info.name not in known:
            default_registry.register(info)
        elif default_registry.get_optimizer_info(info.name).opt_class is not info.opt_class:
            raise ValueError(f"timm's registry has another optimizer of the name {info.name}: register() keeps it")
