"""How a step is computed: the counter-based noise and the reference that every faster engine must agree with."""
