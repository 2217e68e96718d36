"""What makes signstep known to other libraries by name, which are imported only when asked for.

The Trainers of Lightning and Hugging Face take the optimizers as they are; see the examples.
"""
