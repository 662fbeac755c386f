"""What a person looks at: tables and plots of runs, sweeps, decodes as they go on, as pages and as films."""
