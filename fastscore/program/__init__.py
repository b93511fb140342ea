"""The compiler of row programs: it traces a network, keeps what depends on x as instructions, and hoists the rest."""
