// Broken-compile does not compile: it calls a function that nobody wrote.
package main

import "fmt"

func main() {
	fmt.Println(greet("world"))
}
