"""The rollout side: denoising engine, reveal rules, rollout actors, the fleet, evaluation. Imports `common` only."""
