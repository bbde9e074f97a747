// Release runs before a release is live, as a migration would.
package main

import "fmt"

func main() { fmt.Println("migrated") }
