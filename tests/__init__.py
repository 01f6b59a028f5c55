"""All tests; a package, so that a rank process imports a case under the name pytest knows it by."""
