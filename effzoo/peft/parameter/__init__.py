"""Parameter composition, f(theta + phi): methods that change what a site's weight or bias is."""
