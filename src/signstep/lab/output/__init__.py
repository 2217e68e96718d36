"""What every tool writes with: figures, tables, statistics, pages and files."""
