"""kill -9 of real processes under load: nothing acknowledged is lost, primary and replica agree, points are true."""
