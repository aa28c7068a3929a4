"""What the interpreter and the system give, in one place each: clocks, and what a fork leaves behind."""
