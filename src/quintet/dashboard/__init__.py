"""One page that shows all services of a deployment as they run."""
