"""The benchmark of the norm: who is compared (contestants), in which processes (pool, worker), and what is printed."""
