"""Commands that train several times: the checks, the comparison of recipes, the tables of the page."""
