//go:build premium

package main

const tier = "premium"
