// Broken-panic panics at its start.
package main

import "log"

func main() {
	log.Print("reading settings")
	var settings map[string]string
	settings["name"] = "broken-panic"
}
