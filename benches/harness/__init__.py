"""What `scripts/demo` and `benches/load` share: a daemon under test, fio, the machine, statistics. Standard library only."""
