"""Reports that single programs write when they are done."""
