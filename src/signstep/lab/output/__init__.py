"""What every tool of the lab writes with: figures, tables, statistics, pages, files, commands, the machine's name.

Nothing here knows of trainings, benchmarks or the paper.
"""
