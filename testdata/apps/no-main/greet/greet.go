// Package greet is a library: this repository has no main package to run.
package greet

// Hello greets by name.
func Hello(name string) string { return "Hello " + name }
