"""Real jobs on unchanged Spark, with data made on the spot and answers that can be checked."""
