"""Workers of `bench_train`: each a process of its own, so that memory and settings are its own."""
