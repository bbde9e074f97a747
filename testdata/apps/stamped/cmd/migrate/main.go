// Migrate is for m3o run.
package main

func main() { println("nothing to migrate") }
