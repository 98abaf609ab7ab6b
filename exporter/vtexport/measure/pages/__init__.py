"""Reports as HTML pages that consist of one file each and ask for nothing else."""
