"""Where limits meet other people's software: one module for each, which only its users import."""
