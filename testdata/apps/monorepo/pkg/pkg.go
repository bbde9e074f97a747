// Package pkg is shared by the services.
package pkg

// Greeting is what they say.
const Greeting = "monorepo"
