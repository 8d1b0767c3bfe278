"""Many ranks made one: who they are, collectives over them, and gradient sync."""
