"""What holds for all tests: hypothesis may be slow, since tests run on machines that do other work as well."""

from hypothesis import HealthCheck, settings

settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")
