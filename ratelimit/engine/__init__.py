"""How a question becomes an answer: generators of steps, without sockets."""
