"""What README and docs say of results/: tables, numbers and verdicts, written from the files and never by hand."""
