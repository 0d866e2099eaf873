"""Function composition, phi(f(x)): methods that transform what a site receives or returns."""
