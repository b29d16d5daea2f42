"""What watches over a run: steps left out, going back, hashes of weights, figures of features, replay."""
