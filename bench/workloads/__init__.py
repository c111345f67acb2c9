"""One module for each workload; `run` measures it and answers the rows of the table."""
