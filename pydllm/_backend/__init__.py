"""Choice, registration, launch, environment and errors: each in one file, and nowhere else."""
