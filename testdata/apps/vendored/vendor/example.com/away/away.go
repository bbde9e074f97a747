// Package away is of a module that no proxy has: it comes with the tree.
package away

// Name is where it is used.
const Name = "vendored"
