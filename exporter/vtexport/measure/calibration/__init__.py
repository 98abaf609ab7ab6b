"""What `vtexport.measure.calibrate` consists of: batches of pairs on the model, and results kept between runs."""
