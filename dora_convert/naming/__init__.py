"""Find the stored tensor that a module name means, family by family."""
