"""What differs between the contests' tasks, a module each. ``docs/extending.md`` says how to add one."""
