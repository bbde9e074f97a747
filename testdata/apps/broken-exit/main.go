// Broken-exit ends at once with status 1.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "DATABASE_URL is not set")
	os.Exit(1)
}
