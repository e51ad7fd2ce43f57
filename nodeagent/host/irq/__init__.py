"""Host threads and interrupts on exclusive CPUs."""
