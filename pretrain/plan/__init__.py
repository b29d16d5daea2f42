"""What a run will need, before anything is rented: arithmetic only, torch is never imported."""
