"""The schema's history. `polycollide migrate` brings a database up to date."""
