"""What a configuration can see, what a machine has, what was measured."""
