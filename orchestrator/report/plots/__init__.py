"""Pictures as PNG, in colours that colour-blind readers tell apart."""
