"""Work on a Slurm cluster: submitit submits and queues again, Slurm schedules; here is only what each job is to do."""
