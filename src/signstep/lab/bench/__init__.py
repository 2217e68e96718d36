"""What a step costs in computation, communication and memory, beside its peers."""
