"""The paper's table and figures: which runs they need, the sweep, and the report."""
