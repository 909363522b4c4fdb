"""ElasticTok: images and long videos as few tokens as their content needs."""
