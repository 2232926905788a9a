"""Where ``tune run kd_recipes.<recipe>`` lands: torchtune runs the package, not the module named."""

from kd_recipes.entry import requested_recipe, run_recipe

if __name__ == "__main__":
    raise SystemExit(run_recipe(requested_recipe()))
