// Gin-shortener makes short links with gin.
package main

import (
	"crypto/sha256"
	"encoding/base32"
	"log"
	"net/http"
	"net/url"
	"os"
	"sync"

	"github.com/gin-gonic/gin"
)

func main() {
	gin.SetMode(gin.ReleaseMode)
	var links sync.Map
	r := gin.New()
	r.Use(gin.Recovery())
	r.GET("/", func(c *gin.Context) { c.String(http.StatusOK, "gin-shortener\n") })
	r.POST("/links", func(c *gin.Context) {
		var body struct {
			URL string `json:"url" binding:"required"`
		}
		if err := c.ShouldBindJSON(&body); err != nil {
			c.JSON(http.StatusBadRequest, gin.H{"error": err.Error()})
			return
		}
		if u, err := url.Parse(body.URL); err != nil || u.Scheme != "https" {
			c.JSON(http.StatusBadRequest, gin.H{"error": "want an https URL"})
			return
		}
		sum := sha256.Sum256([]byte(body.URL))
		id := base32.StdEncoding.EncodeToString(sum[:])[:8]
		links.Store(id, body.URL)
		c.JSON(http.StatusCreated, gin.H{"id": id})
	})
	r.GET("/l/:id", func(c *gin.Context) {
		to, ok := links.Load(c.Param("id"))
		if !ok {
			c.Status(http.StatusNotFound)
			return
		}
		c.Redirect(http.StatusFound, to.(string))
	})
	log.Fatal(r.Run(addr()))
}

func addr() string {
	if p := os.Getenv("PORT"); p != "" {
		return ":" + p
	}
	return ":8080"
}
