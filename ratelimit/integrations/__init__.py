"""Where limits meet other people's software: one module for each, imported by who uses it and by nobody else."""
