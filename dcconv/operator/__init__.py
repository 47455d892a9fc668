"""What is computed: functions, records and their checks, constants, and the reference."""
